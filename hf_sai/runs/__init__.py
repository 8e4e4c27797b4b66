"""What a run leaves behind: its record, the environment it ran in, and no secrets."""
