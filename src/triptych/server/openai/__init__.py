"""The OpenAI-compatible interface: images and videos as the official clients ask for them."""
