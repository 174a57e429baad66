"""What is measured of networks, one file a measure; `train.evidence` lists and runs them.

A measure of one network is `measure(study, name)`, one of several together or of the data `measure(study)`; both return
what belongs into evidence.json, and raise `NotMeasured` where something that they need is not there. `lines(evidence)`
tells it in Markdown.
"""
