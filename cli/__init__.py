"""The command line `bard-vl`: one file per command, and the options that they share.

Installed as the package `bard_vl_cli`: see main.py.
"""
