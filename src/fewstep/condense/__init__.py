"""Few examples: data sets made small, and the training on what is left of them."""
