"""From folders, tables and data sets to examples: pictures, captions, concepts, and all that is wrong with them."""
