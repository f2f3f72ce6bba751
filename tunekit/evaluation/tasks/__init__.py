"""Tasks of EleutherAI's lm-eval (the extra `tunekit[evals]`), computed by our own model. The only door of lm_eval."""
