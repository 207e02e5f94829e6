"""A model that is served: OpenAI's chat API over Ray Serve, to try a checkpoint out and to look at it from other programs.

wire.py      what travels: requests as they are read and refused, answers as they are written
replica.py   one process with a model, and its answers over HTTP
serve.py     `mllm serve`: replicas, the address, the end
talk.py      `mllm chat`: the same model in a terminal, without Ray
find.py      an export's folder or a run's name to the folder that is served
"""
