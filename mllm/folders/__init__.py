"""Trained models as folders: what each holds, how it is written, and the same model again from it.

llava, llava_next, llava_next_video, internvl,  models that transformers has whole: one folder of its class   `wholes`, `idefics`
    idefics
parts: any other vision-language model          encoder/, lm/ (transformers), connector.safetensors           `parts`
                                                and, where a fusion has weights, fusion.safetensors;
                                                BLIP-2 and InstructBLIP besides whole/, as one model           `blip2`
transformers: a model of another kind that      a folder of its class, and rest.safetensors where ours        `kinds`
    transformers has                            has more
whole: any other                                model.safetensors under the model's own names; BLIP and        `own`, `blip`
                                                BLIP-2's first stage besides as transformers' classes

`mllm.export` chooses; what is told to transformers of pictures and texts is in `processors`. To add one: a class with `kind`,
`write` and `read`, and its line in `mllm.export.form_of`.
"""
