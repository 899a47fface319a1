"""Loading models, scoring text with them, generating from them."""
