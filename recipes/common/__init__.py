"""What only the recipes and benchmarks use: text without a network, reading settings, search of rates, tables."""
