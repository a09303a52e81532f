"""How the router's gradient is estimated: from token losses and selections to a scalar whose gradient trains it.

registry.py          name -> what an estimator claims, known without torch; a new one is a file here and an entry there
base.py              what an estimator gives: a surrogate, and numbers of its own that it learns from the steps
rollouts.py          what M passes leave behind, and what estimators have in common: returns, baselines, scores
paper.py             as published
rtg.py               reward-to-go and the set's log-probability
control_variate.py   rtg with a linear control variate from the LoRAs' backward pass
straight_through.py  biased: first order, through the inclusion probabilities

Proofs are in docs/estimators.md; `remix verify-estimator` checks the claims.
"""
