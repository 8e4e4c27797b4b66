"""Everything that knows transformers' Trainer: the optimizer's name, its arguments, callbacks, the range test."""
