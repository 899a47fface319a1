"""Built-in launchers: processes of this machine, jobs of Slurm, tasks of Ray."""
