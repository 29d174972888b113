"""How good a fine-tune is: measures, the models that they are measured with, and what follows for the user."""
