"""Commands of the command line in addition to those of the trainer."""
