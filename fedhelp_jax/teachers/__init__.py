"""Foundation models: what they answered about public images, asked once."""
