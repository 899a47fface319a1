"""Tasks of EleutherAI's lm-evaluation-harness (`lm-eval`) on any artefact."""
