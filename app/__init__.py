"""What command line, viewer, serving and examples share: sessions, memory, chats, errors, text on a terminal."""
