"""Which student to make of a teacher: losses between features, scores of untrained architectures, search."""
