"""Predicts what models take on GPUs that are not here: a roofline of each rank's work and a model of its messages.

work.py, memory.py       what a rank computes and holds, from the family's plan and the layout table
hardware.py              devices, links and machines, by their makers' specifications
assumptions.py           what share of a peak is reached: the only numbers nobody here can measure
rates.py, latency.py     seconds of work, seconds of messages
schedule.py              the passes in which the engine runs a batch
prediction.py            both, for a layout of ranks: TTFT, time a token, throughput, memory
calibration.py           the same work fitted to what was measured on this machine, and how well it predicts
measured.py              what was measured on a GPU, in place of the roofline
validation.py, advice.py the headline ranges; which layout is best, and why
"""
