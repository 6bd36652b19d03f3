"""fewbit: quantise language models after training."""
