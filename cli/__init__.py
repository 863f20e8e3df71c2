"""The command line `bard-vl`: one file per command, and the options that they share."""
