"""Tasks of EleutherAI's lm-eval (the extra `tunekit[evals]`), computed by our own model. Only this package imports
lm_eval."""
