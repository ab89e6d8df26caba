"""How fast this machine runs a Kimi, beside its peers and beside what the machine can do.

moonkit bench vision        python -m bench.run vision

run.py (the verb; a child process for each group)
  ├─ vision.py  language.py (prefill, decode, int4)  serving.py (batching)  training.py  files.py (load, media)
  │     sides: ours, a peer, a peer in a process with the stock allocator, the machine itself
  ├─ timing.py  take_turns(sides) -> Times       every side once a round; rounds that others disturbed are marked
  └─ rows.py    Row.of(times, ...) -> rates, ratios, share of the ceiling, goals met or not
"""
