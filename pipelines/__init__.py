"""What is read: shards -> documents -> tiles -> tokens -> packs, in an order that is a pure function.

    Window --read--> Document --tile--> Tiled --encode--> Sample --pack--> Pack --Batch.of--> Batch
    order.py         corpora.py         tiling.py         encode.py        packing.py         types.py

Nothing here knows a model; all it needs of one are the numbers of `VisionLayout`. Only `stream.py` imports Ray.
"""
