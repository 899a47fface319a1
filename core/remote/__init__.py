"""Remote storage: folders of any fsspec file system, and repositories of the Hugging Face hub."""
