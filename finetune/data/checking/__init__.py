"""The data-set doctor: every problem of a data set at once, in order of weight."""
