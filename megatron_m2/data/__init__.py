"""From text to token forests: tokenizer, Megatron's indexed files, corpora, weighted blends, packing."""
