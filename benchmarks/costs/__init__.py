"""A cost model of training runs: memory, time and communication, from configs alone. `facts` is what it is fed."""
