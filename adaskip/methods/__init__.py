"""Methods of the field that choose layers without a gradient, one file each: what they look at, and the plan they make.

evidence = Evidence(model, batches, inputs)              # measures what a method asks for, once
plan = find("block_influence").policy(evidence, keep=0.8)  # a SkipPlan: adaskip.attach(base, plan)
"""
