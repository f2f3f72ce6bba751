"""Runs tasks of EleutherAI's lm-eval (the extra `tunekit[evals]`) on tunekit's own models. Only this package imports
lm_eval."""
