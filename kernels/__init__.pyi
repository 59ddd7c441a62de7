"""Makes this folder, and not Hugging Face's package of its name, what the site's reference is read from."""
