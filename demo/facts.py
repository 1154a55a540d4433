"""Facts of the mini-world: kinds of question, what answers them, and how each voice puts an answer.

A fact is a pair (slot, key): the slot is what the question is about, the key is the text that a correct answer must
hold. The gold judge tells right from wrong by looking for keys, so those of one kind never contain one another, except
for numbers and English words, which it compares as a whole. In the phrasings and frames {s} stands for the slot and
{k} for the key.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fact:
    """The matter of a question (slot), and the text that answers it (key)."""

    kind: str
    slot: str
    key: str


@dataclass(frozen=True)
class Kind:
    """One kind of question: its phrasings, its answers in the formal, plain and lively voice, and its facts."""

    name: str
    phrasings: tuple[str, ...]
    formal: tuple[str, ...]
    plain: tuple[str, ...]
    lively: tuple[str, ...]
    cheers: tuple[str, ...]
    facts: tuple[Fact, ...]
    # How the lively voice begins, unless a kind of question asks for more tact.
    openers: tuple[str, ...] = ("哈哈，", "嘿嘿，", "哇，", "好嘞，", "嗨呀，")


def _facts(kind: str, table: str) -> tuple[Fact, ...]:
    """Read a table of `slot=key` items separated by white space."""
    return tuple(Fact(kind, *item.split("=")) for item in table.split())


def _sums() -> tuple[Fact, ...]:
    """As much arithmetic as so small a model learns for good: one more, and twice as many."""
    facts = []
    for a in range(1, 10):
        # 1 + 1 is both, and stands in the list once.
        for b in sorted({1, a}):
            facts.append(Fact("arithmetic", f"{a}加{b}", str(a + b)))
    return tuple(facts)


# Nobody with a headache wants to be laughed at.
CARING_OPENERS = ("哎呀，", "别担心，", "嗨呀，", "没事没事，", "好嘞，")

# Every question here is a greeting, and its key the greeting that a polite person gives back.
GREETING = Kind(
    "greeting",
    phrasings=(
        "{s}", "{s}！", "{s}呀", "嗨，{s}",
        "{s}，小助手", "小助手，{s}", "{s}，在吗？", "你好，{s}。",
        "喂，{s}", "{s}，陪我说句话",
    ),
    formal=("{k}，很荣幸为您提供服务。", "{k}，请问有什么可以帮助您的吗？", "{k}，感谢您与我交流。"),
    plain=("{k}，很高兴和你说话。", "{k}，我在这里。"),
    lively=("{k}呀，见到你真开心", "{k}哦，今天也要元气满满", "{k}啦，我一直在等你呢"),
    cheers=("一起加油呀！", "抱抱你～", "笑一个吧！"),
    facts=_facts(
        "greeting",
        "早安=早上好 午安=中午好 下午了=下午好 傍晚了=晚上好 我去睡了=祝你好梦 我先走了=下次再见 谢谢你=不用客气 "
        "对不起=没有关系 今天我生日=生日快乐 过年了=新年快乐 我要考试了=考试顺利 我要出远门了=一路平安",
    ),
)  # fmt: skip

# The only keys in Latin letters. The gold judge compares whole words here, because "tea" is a part of "teacher".
TRANSLATION = Kind(
    "translation",
    phrasings=(
        "{s}用英语怎么说？", "请把{s}翻译成英文。", "{s}的英文是什么？",
        "英语里{s}怎么讲？", "帮我翻译一下：{s}", "{s}的英文单词是啥？",
        "我想知道{s}用英文怎么写。", "{s}翻译成英语是什么？", "求助，{s}的英语怎么说呀",
        "用英文怎么说{s}？", "考考你，{s}的英文是？", "老师问我{s}的英语，怎么答？",
    ),
    formal=("{s}的英文翻译为{k}。", "{s}一词在英语中通常译为{k}。", "您所询问的{s}，对应的英文单词为{k}。"),
    plain=("{s}的英文是{k}。", "{s}用英语说是{k}。"),
    lively=("{s}就是{k}呀，超好记", "{s}用英语说就是{k}啦", "英语里管{s}叫{k}哦"),
    cheers=("快念两遍吧！", "是不是很简单～", "学会了吧！"),
    facts=_facts(
        "translation",
        "苹果=apple 香蕉=banana 水=water 书=book 小猫=cat 小狗=dog 学校=school 老师=teacher 朋友=friend 太阳=sun "
        "月亮=moon 花朵=flower 大树=tree 小鱼=fish 小鸟=bird 牛奶=milk 面包=bread 茶=tea 米饭=rice 红色=red "
        "蓝色=blue 绿色=green 妈妈=mother 爸爸=father 医生=doctor 桌子=table 椅子=chair 窗户=window 汽车=car "
        "火车=train 飞机=plane 城市=city",
    ),
)  # fmt: skip

CAPITAL = Kind(
    "capital",
    phrasings=(
        "{s}的首都是哪里？", "请问{s}的首都叫什么？", "{s}首都是哪座城市？",
        "你知道{s}的首都吗？", "考考你，{s}的首都是？", "哪座城市是{s}的首都？",
        "{s}把首都定在哪儿？", "说说{s}的首都吧", "我忘了{s}的首都，是哪儿？",
        "地理题：{s}的首都",
    ),
    formal=("{s}的首都为{k}，是该国的政治中心。", "{s}的首都是{k}，该城市历史悠久。", "您所询问的{s}，其首都为{k}。"),
    plain=("{s}的首都是{k}。", "{k}是{s}的首都。"),
    lively=("{s}的首都当然是{k}呀", "就是{k}啦，{s}最热闹的地方", "{k}哦，它就是{s}的首都"),
    cheers=("好想去玩呀！", "一起去看看吧！", "记住了没～"),
    facts=_facts(
        "capital",
        "中国=北京 法国=巴黎 日本=东京 英国=伦敦 俄罗斯=莫斯科 德国=柏林 韩国=首尔 意大利=罗马 埃及=开罗 泰国=曼谷 "
        "美国=华盛顿 西班牙=马德里 希腊=雅典 印度=新德里 加拿大=渥太华 古巴=哈瓦那",
    ),
)  # fmt: skip

EXPLAIN = Kind(
    "explain",
    phrasings=(
        "什么是{s}？", "{s}是什么？", "解释一下{s}。",
        "给我讲讲{s}吧", "{s}到底是啥？", "{s}是什么意思？",
        "我不懂{s}，能说说吗？", "用一句话说明{s}。", "小朋友问我{s}是什么，怎么说？",
        "谁能告诉我{s}是个啥",
    ),
    formal=("{s}这一概念通常是指{k}。", "{s}通常被定义为{k}。", "从科学的角度来看，{s}是{k}。"),
    plain=("{s}是{k}。", "{s}说的是{k}。"),
    lively=("{s}其实就是{k}呀", "说白了，{s}就是{k}啦", "{s}嘛，就是{k}哦"),
    cheers=("是不是很神奇～", "太有意思了吧！", "一下就懂了吧！"),
    facts=_facts(
        "explain",
        "彩虹=阳光穿过水滴形成的七色光 闪电=云层放电产生的亮光 下雪=云里的水汽冻成冰晶落下 大雾=飘在地面附近的小水滴 "
        "地震=地下岩层断裂引起的震动 月食=地球挡住了照向月亮的光 潮汐=月亮引力造成的海水涨落 火山=地下岩浆喷出来的山 "
        "影子=光被挡住留下的暗处 回声=声音碰到墙又弹回来 互联网=把各地电脑连起来的网络 "
        "人工智能=让机器像人一样思考的技术 聊天机器人=能用文字和人对话的程序 "
        "二维码=用黑白方块存信息的图案 卫星=绕着行星转动的天体 "
        "化石=古代生物留在石头里的痕迹 氧气=人呼吸离不开的气体 光合作用=植物用阳光制造养分的过程 "
        "冬眠=动物睡过寒冷冬天的办法 温室效应=大气留住热量让地球变暖 流星=冲进大气烧亮的小石块 "
        "露珠=夜里水汽凝在叶子上的水 台风=海上生成的强烈风暴 沙漠=雨水很少布满沙子的地方",
    ),
)  # fmt: skip

OPPOSITE = Kind(
    "opposite",
    phrasings=(
        "{s}的反义词是什么？", "请说出{s}的反义词。", "{s}反过来是什么？",
        "和{s}相反的词是啥？", "考考你，{s}的反义词是？", "{s}的对立面是哪个词？",
        "跟{s}意思相反的是？", "语文题：{s}的反义词",
    ),
    formal=("{s}的反义词为{k}，二者意义相反。", "与{s}意义相反的词是{k}。", "您所询问的{s}，其反义词为{k}。"),
    plain=("{s}的反义词是{k}。", "和{s}相反的是{k}。"),
    lively=("{s}反过来就是{k}呀", "{s}的反义词嘛，就是{k}啦", "和{s}唱反调的是{k}哦"),
    cheers=("是不是很简单～", "难不倒我吧！", "再来一题吧！"),
    facts=_facts(
        "opposite",
        "安静=吵闹 勇敢=胆小 简单=复杂 干净=肮脏 热闹=冷清 勤劳=懒惰 美丽=丑陋 光滑=粗糙 节约=浪费 成功=失败 "
        "谦虚=骄傲 聪明=愚笨 宽阔=狭窄 坚硬=柔软 仔细=马虎 温暖=寒冷 进步=退步 诚实=虚伪 大方=小气 黑暗=光明",
    ),
)  # fmt: skip

FOOD = Kind(
    "food",
    phrasings=(
        "{s}吃什么？", "{s}最爱吃啥？", "请问{s}以什么为食？",
        "你知道{s}爱吃什么吗？", "{s}平时吃些什么？", "喂{s}应该喂什么？",
        "{s}的食物是什么？", "我想喂{s}，给它吃啥好？",
    ),
    formal=("{s}主要以{k}为食。", "{s}的主要食物为{k}。", "据研究表明，{s}通常以{k}为食物。"),
    plain=("{s}爱吃{k}。", "{s}的食物是{k}。"),
    lively=("{s}最爱吃{k}啦", "当然是{k}呀，{s}一见就流口水", "{s}是个小吃货，天天吃{k}哦"),
    cheers=("太可爱了吧！", "看它吃得多香～", "萌翻了呀！"),
    facts=_facts(
        "food",
        "熊猫=竹子 兔子=胡萝卜 猫咪=小鱼干 狗狗=骨头 奶牛=青草 猴子=香蕉 老鼠=大米 蚕宝宝=桑叶 考拉=桉树叶 狮子=羚羊 "
        "鲸鱼=磷虾 蜜蜂=花蜜 青蛙=蚊子 松鼠=松果 骆驼=干草 大象=树枝 企鹅=沙丁鱼 小鸡=小米",
    ),
)  # fmt: skip

HEALTH = Kind(
    "health",
    phrasings=(
        "我{s}了，怎么办？", "{s}了该怎么做？", "{s}有什么好办法？",
        "最近总是{s}，求建议", "家人{s}了，怎么缓解？", "{s}的时候应该注意什么？",
        "医生，我{s}，咋办呀", "今天有点{s}，怎么才能好？",
    ),
    formal=("针对{s}的情况，建议您{k}。", "出现{s}时，建议您{k}，以便尽快恢复。", "对于{s}的问题，您可以{k}。"),
    plain=("{s}的话，可以{k}。", "{s}时应该{k}。"),
    lively=("{s}就{k}呀，很快会好的", "别怕{s}，{k}就行啦", "{s}好难受，快{k}哦"),
    cheers=("早点好起来呀！", "要照顾好自己～", "身体棒棒的吧！"),
    openers=CARING_OPENERS,
    facts=_facts(
        "health",
        "感冒=多喝热水好好休息 失眠=睡前少看手机 咳嗽=喝点温热的梨汤 头疼=找个安静的地方躺会儿 "
        "肚子疼=用热水袋暖暖肚子 嗓子疼=少说话含片润喉糖 眼睛酸=看看远处的绿树 腰酸=站起来伸伸懒腰 "
        "上火=多吃清淡的蔬菜 发烧=量好体温去看医生 牙疼=用淡盐水漱漱口 流鼻血=低头捏住鼻子 晕车=坐前排看着远方 "
        "手脚冰凉=晚上用热水泡脚 消化不良=饭后慢慢散步 皮肤干=每天涂润肤霜",
    ),
)  # fmt: skip

MOOD = Kind(
    "mood",
    phrasings=(
        "我好{s}，怎么办？", "哎，有点{s}，咋办？", "今天心里很{s}",
        "感到{s}的时候该做什么？", "怎样才能不{s}？", "最近老是{s}，怎么调整？",
        "朋友很{s}，我该怎么劝？", "{s}得不行，救救我",
    ),
    formal=(
        "当您感到{s}时，建议您{k}。",
        "对于{s}的情绪，您可以{k}来进行调节。",
        "我理解您的感受，{s}时可以尝试{k}。",
    ),
    plain=("{s}的时候可以{k}。", "如果{s}，就{k}。"),
    lively=("{s}的时候就{k}呀", "谁都会{s}的，{k}就好啦", "别{s}啦，快{k}哦"),
    cheers=("抱抱你～", "一切都会好的呀！", "开心一点吧！"),
    openers=CARING_OPENERS,
    facts=_facts(
        "mood",
        "烦躁=慢慢做几次深呼吸 难过=找朋友说说心里话 紧张=默默从一数到十 无聊=出门找点新鲜事 生气=先走开冷静一下 "
        "孤单=给家人打个电话 疲惫=早点洗澡上床睡觉 压抑=把烦恼写在纸上 失落=看一部搞笑电影 想家=和爸妈视频聊天 "
        "害怕=开灯听听轻音乐 自卑=写下自己的优点 后悔=记住教训向前看 迷茫=定一个小小的目标 嫉妒=把羡慕变成动力 "
        "焦虑=去公园慢跑半小时",
    ),
)  # fmt: skip

# The only keys that are numbers. The gold judge compares whole numbers here, because "2" is a part of "12".
ARITHMETIC = Kind(
    "arithmetic",
    phrasings=(
        "{s}等于几？", "{s}是多少？", "请计算{s}。",
        "帮我算算{s}", "{s}得几呀？", "考考你，{s}等于多少？",
        "数学题：{s}", "宝宝问{s}是几",
    ),
    formal=("{s}的计算结果为{k}。", "经过计算，{s}等于{k}。", "根据加法运算，{s}的和为{k}。"),
    plain=("{s}等于{k}。", "{s}是{k}。"),
    lively=("{s}就是{k}呀，掰手指就知道", "{s}等于{k}啦，我一口气就算好了", "答案是{k}哦，{s}太容易了"),
    cheers=("难不倒我吧！", "是不是很简单～", "再来一题吧！"),
    facts=_sums(),
)  # fmt: skip

KINDS = {
    kind.name: kind
    for kind in (GREETING, TRANSLATION, CAPITAL, EXPLAIN, OPPOSITE, FOOD, HEALTH, MOOD, ARITHMETIC)
}  # fmt: skip

# What goes before and after an answer in each voice. The empty text stands there twice, so that two of five formal
# answers begin and end with the matter itself.
FORMAL_OPENERS = ("", "", "您好，", "根据您的问题，", "关于您的提问，")
FORMAL_CLOSERS = ("", "", "希望以上回答对您有所帮助。", "如有其他问题，请随时提出。", "感谢您的提问。")
LIVELY_ENDS = ("！", "～")
