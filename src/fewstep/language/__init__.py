"""Language models: roll-outs, speculative decoding, and the methods that train or distil them."""
