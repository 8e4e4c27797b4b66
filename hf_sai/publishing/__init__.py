"""From a run's record to the Hub: pictures, model cards, uploads."""
