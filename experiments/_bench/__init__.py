"""What ``experiments.bench`` measures, one subcommand in each file, and how it measures."""
