"""Shared by command line, viewer, serving and examples: sessions, memory, chats, errors, text on a terminal.

The package imports it first, before transformers.
"""

from .programs import is_own_program, keep_logs_readable

if is_own_program():
    keep_logs_readable()
