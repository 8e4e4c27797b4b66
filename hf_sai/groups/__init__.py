"""Which parameters form a group: what decays, adapters and their roles."""
