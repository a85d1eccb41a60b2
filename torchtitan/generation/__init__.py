"""Text from a trained model: KV cache, sampling, chat templates, the loop."""
