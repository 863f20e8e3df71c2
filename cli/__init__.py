"""The command line `bard-vl`: one file per command, and what the commands share."""
