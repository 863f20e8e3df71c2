"""Shared by command line, viewer, serving and examples: sessions, memory, chats, errors, text on a terminal."""
