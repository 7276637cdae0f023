"""Name the figures of an evaluation that the report shows, and the columns they stand in."""

from __future__ import annotations

GENERATED = {
    "dense_accuracy": "dense accuracy",
    "routed_accuracy": "routed accuracy",
    "static_accuracy": "static accuracy",
    "agreement": "agreement",
    "static_agreement": "static agreement",
    "keep": "keep rate",
    "static_keep": "static keep rate",
    "flops_saved": "FLOPs saved",
}
WORDED = {
    f"{side}_{name}": f"{side} {name.replace('_', ' ')}"
    for name in ("edit_distance", "hallucinated")
    for side in ("dense", "routed", "static")
}
READ = {
    "kl": "KL(dense, routed)",
    "static_kl": "KL(dense, static)",
    "token_agreement": "token agreement",
    "static_token_agreement": "static token agreement",
    "dense_perplexity": "dense perplexity",
    "routed_perplexity": "routed perplexity",
    "static_perplexity": "static perplexity",
    "dense_log_likelihood": "dense log-likelihood",
    "routed_log_likelihood": "routed log-likelihood",
    "static_log_likelihood": "static log-likelihood",
}
