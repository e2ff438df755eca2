"""A run folder: what a run is made of, how it goes on, what it leaves; one way for the library, the command line, the
report and the demonstration."""
