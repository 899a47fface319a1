"""Federation simulator: the coordinator's real code with modelled owners on a simulated clock."""
