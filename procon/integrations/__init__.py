"""ProCon inside other people's training frameworks."""
