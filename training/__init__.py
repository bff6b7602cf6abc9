"""How the embedded trio was made: data, tokenizer, training, evaluation and export (not part of the wheel)."""
