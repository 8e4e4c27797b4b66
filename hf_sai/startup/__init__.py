"""What the runner gives to the processes that its script starts: this folder leads their import path."""
