"""What Flower carries from the coordinator to owners: two files that only name what is installed on either side."""
