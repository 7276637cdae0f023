"""The theory as pure functions: how redundant a layer is, by which measure, and which verdict follows.

`bounds` holds the chain from geometry to information, `measures` what is read off hidden states and attention,
`conformal` calibrated constants and their test, `intervals` the uncertainty over inputs. Information is in nats.

Marks in the docstrings: [P] the notion is the paper's (arXiv 2509.25584); [D] derived in this project. A *bound* or
*identity* is proved, a *calibrated* quantity holds with a stated probability, an *estimator* approximates, a
*heuristic* only ranks.
"""
