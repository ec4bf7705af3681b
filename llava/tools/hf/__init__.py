"""Parts of the commands that go from a LLaVA checkpoint to a folder of stock transformers, and back."""
