"""What command line, viewer, serving and examples share: sessions, pictures and videos, errors, text on a terminal."""
