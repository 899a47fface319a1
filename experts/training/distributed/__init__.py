"""Training of one run by several processes with torch.distributed: the ranks, and what each of them holds and exchanges."""
