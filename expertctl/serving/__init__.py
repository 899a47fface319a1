"""The HTTP interface: models behind the protocol of OpenAI's API, and a page to try them."""
